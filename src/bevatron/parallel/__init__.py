"""Placing a spec on processes. The only room that touches process groups.

Parameters are DTensors, activations plain local tensors. The one visible order of placement is in
`placement.py`.
"""
