"""What a silo teaches and asks: tasks, their official files, their prompts and their official metrics.

A task's reader turns a record of its file into `Item`s: questions in words, and what is right. From
there on all tasks are one: `rendering` makes token ids of items, `likelihood` or generation answers
them, and the task's metric scores the answers.
"""
