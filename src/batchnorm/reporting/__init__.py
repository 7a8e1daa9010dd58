"""Reporting: every command shows its results through a ``Report``: as text, as data for programs, or as a page.

A ``Report`` (``rows``) consists of rows, texts and tables (``blocks``); ``formats`` is the table of all output formats,
which every command offers. Nothing here depends on the subject of a report.
"""
