"""Two rules that a course may change, so that a solution copied from the project fails.

To change a rule, change all places that are named with it: the constant here, the function, and the
docstrings, which are the handout. The tests follow the constant. The instructor's copy has the new
lines of code in tests/test_assignment.py, test_changed_rules_change_all_that_follows. Then run
`python -m pytest`, and make the assignment after that.
"""

import math

# How many whole slots a fraction gives. To round down: math.floor.
#   function      moe.expert_capacity
#   docstrings    expert_capacity; ExpertChoice, with its example, where C becomes 1; SoftMoE
#   numbers       tests/test_robustness.py, test_a_limited_capacity: 4 slots instead of 5
ROUND = math.ceil

# Which of two tokens with the same priority is served first. To serve the later one: True.
#   function      moe.assign_slots
#   docstring     assign_slots
LATER_TOKEN_FIRST = False
