"""What an optimizer's own part of a step costs, without the model's."""
