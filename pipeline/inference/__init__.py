"""Shards in, Parquet out: plan, the chain read -> detect -> write, finish check, report."""

from pipeline.inference.dryrun import dry_run
from pipeline.inference.report import Report, summary_text
from pipeline.inference.run import infer

__all__ = ["Report", "dry_run", "infer", "summary_text"]
