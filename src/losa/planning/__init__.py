"""What a run will need, before it starts: memory, simulated; time, tried and counted; and a rehearsal of what costs nothing."""
