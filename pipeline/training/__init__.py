"""Training on Ray Train: shards -> augmented batches (tasks) -> steps (workers) -> a checkpoint for `infer`.

Read in this order: `plan` (what a run will do), `index` (where every image lies), `order` (which images make
which batch), `samples` (their pixels and boxes), `optimise` and `loop` (the steps, plain PyTorch),
`validation`, and `run`, which wires it all to Ray.
"""
