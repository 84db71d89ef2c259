"""Proofs about runs and machines: layouts compared, faults injected, an examination of the machine."""
