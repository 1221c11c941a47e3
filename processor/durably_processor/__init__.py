"""The stateful processor: it owns partitions, advances their runs and writes their logs."""
