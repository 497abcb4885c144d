"""The report: one page that shows a dataset, its statistics and what was trained on it; no net is run for it."""
