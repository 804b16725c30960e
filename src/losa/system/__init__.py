"""The machine: processes, signals, memory, progress, files of others and files that are written. Knows no model."""
