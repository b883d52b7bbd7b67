"""The control room: what Dagster shows and does.

Assets, checks, sensors and jobs, all of them thin: they call plain functions of the layers below,
which know nothing of Dagster.
"""
