"""The layers: one frozen settings object and one bound class each. Import them from `llmmw`."""
