"""Two rules of the layer, by which the tests compute the numbers that they expect."""

import math

# How many whole slots an expert has, where T K factor / E is a fraction: see moe.expert_capacity.
ROUND = math.ceil

# Whether of two tokens with the same priority the later one is first: see moe.assign_slots.
LATER_TOKEN_FIRST = False
