"""The fault harness: kills, power cuts, disk errors, broken lines, wrong clocks, repetitions."""
