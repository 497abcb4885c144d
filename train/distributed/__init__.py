"""One network on several devices: the processes, how a network is split among them, and what they exchange (docs/parallel.md)."""
