"""The method: data → rollout → reward → advantage → update. Knows no Ray and no HTTP server."""
