"""Execution: one executable per shape, weights with seats, the pool of those that wait."""
