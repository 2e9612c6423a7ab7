# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of dsa_ext: ``python -m benchmarks``."""
