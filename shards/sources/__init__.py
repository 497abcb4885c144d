"""Where images come from, one layout a module. A source lists its inputs in a fixed order and reads one by its location."""
