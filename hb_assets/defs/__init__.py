"""Dagster's assets, checks, sensors and jobs.

All of them are thin: they call plain functions of the layers below, which know nothing of Dagster.
"""
