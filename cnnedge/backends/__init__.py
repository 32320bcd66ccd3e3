"""Adapters: the only modules that import a runtime at the top."""
