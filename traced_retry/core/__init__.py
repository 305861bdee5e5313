# SPDX-License-Identifier: Apache-2.0
"""The retry loop, its policy and its telemetry.

It imports neither LiveKit nor the OpenTelemetry SDK.
"""
