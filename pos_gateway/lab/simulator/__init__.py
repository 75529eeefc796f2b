"""The simulator: years of cut-off shops in minutes, the reserve principle beside what peers do."""
