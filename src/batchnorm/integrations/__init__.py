"""Integrations: thin adapters to training frameworks, loggers and pytest, each imported by its own name.

``from batchnorm.integrations.lightning import BatchNormMonitor``. None is loaded by anything else, and none does more
than to call ``watch``, ``freeze``, ``recalibrate`` or ``examine`` at the right moments of the framework.
"""
