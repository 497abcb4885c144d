"""Photos in, webdataset shards out, and the statistics of what they hold. Knows files; knows neither DALI graphs nor torch."""
