"""The DALI pipelines: orders and draws as data, four deeds in numpy and in DALI, and a `Loader` for torch."""
