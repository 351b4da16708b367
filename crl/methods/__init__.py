"""Ways to keep plasticity or memory: one small class each, from outside the agent."""
