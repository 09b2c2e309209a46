"""Shards in, Parquet out: plan, the chain read -> detect -> write, finish check, report."""
