"""Conversations: their messages, the template that makes a text of them, and the tokens that somebody is to learn."""
