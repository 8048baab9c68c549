"""Execution: one executable per shape, weights with seats, memory."""
