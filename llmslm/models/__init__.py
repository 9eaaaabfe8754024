"""The composition as plain torch and transformers modules: single device, no Trainer needed."""
