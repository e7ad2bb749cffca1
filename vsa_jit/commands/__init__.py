"""The commands around run-time compilation, one module each."""
