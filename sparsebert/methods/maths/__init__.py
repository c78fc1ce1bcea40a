"""The formulas that methods share: functions of tensors and numbers, without a model, a module or a state."""
