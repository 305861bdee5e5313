# SPDX-License-Identifier: Apache-2.0
"""Rules, alerts and dashboards for Prometheus, Alertmanager, Grafana and Kubernetes.

The modules build on each other in this order: ``config`` (thresholds), ``alerts`` (alerts and
ratios), ``recording`` (rates per provider), ``rollup`` (one sample a minute), ``formats`` (YAML
files), ``files`` (everything that ``traced-retry dashboards`` writes).
"""
