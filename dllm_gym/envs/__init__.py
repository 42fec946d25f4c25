"""The faces of the decision process: one lane and many (Gymnasium), TorchRL, Stable-Baselines3; and the dealer that
gives prompts to lanes (`lanes`). They add an API and no physics."""
