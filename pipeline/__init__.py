"""shardshot: image shards in object storage -> SSD detectors on Ray -> two Parquet tables.

Where to look:

    errors     what can go wrong, one class per thing
    config     the flags of every job
    schema     the columns of the two output tables
    boxes      box arithmetic: corners, centres, overlap, encoding
    storage    files and object stores: reading, atomic and exclusive writing, retries
    runlog     counts and progress lines
    runtime    Ray: where the cluster is, how Ray Data is set
    data/      shards -> images -> pixels; annotations; augmentation
    model/     the detector in plain PyTorch: anchors, backbones, SSD, loss, post-processing, checkpoints
    results/   read the tables back, export them
    inference/ plan -> run (the chain) -> sink (detects and publishes); ledger, lock, report
    evaluation/ average precision and what goes with it
    gallery/   pictures with boxes, the HTML report
    training/  index -> order -> batches (Ray tasks) -> steps (plain PyTorch) -> checkpoint

The inference flow, in reading order: jobs/infer.py, inference/plan.py, inference/run.py, inference/blocks.py,
data/shards.py, data/images.py, model/detector.py, model/ssd.py, model/postprocess.py, inference/sink.py,
inference/ledger.py, results/read.py. The training flow: jobs/train.py, training/plan.py, training/run.py,
training/index.py, training/order.py, training/samples.py, training/worker.py, training/session.py,
training/loop.py, training/optimise.py, training/validation.py. Imports point down only, see CONTRIBUTING.md;
tests/test_architecture.py keeps it so.
"""

__version__ = "0.1.0"
