"""Reporting: one way to show what a command found, as text, for programs, or as a page.

A command makes a ``Report`` (``report``) of rows, words and tables (``blocks``); ``formats`` is the table of all output
formats, which every command offers. Nothing here knows what was looked at.
"""
