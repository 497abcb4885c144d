"""The networks and the layers that torch does not have."""
