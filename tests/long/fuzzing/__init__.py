"""The properties that `make fuzz` tries, by kind."""
