"""The weight channel: how the trainer's weights reach the engines."""
