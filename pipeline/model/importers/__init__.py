"""Weights of public releases, recognised by the names of their tensors, each into one of our architectures.

An importer is a module with `recognises(names) -> bool` and `convert(tensors) -> SSD`.
"""
