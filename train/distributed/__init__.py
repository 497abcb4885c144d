"""One network on several devices: schemes, the exchange between ranks, the processes. Explained in docs/parallel.md."""
