#!/usr/bin/env bash
# Asks for a spot slice of eight v5e chips, whose hosts train as soon as it is
# there. After preemption, run it again: the run resumes.
# The bucket has the wheel of `python -m build`, and the prepared data.
#   BUCKET=... PROJECT=... ZONE=... ./queued_resource.sh NAME
set -euo pipefail
name=$1

# On every host. The image has an old Python: uv brings another.
startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat >"$startup" <<END
#!/usr/bin/env bash
set -euo pipefail
mkdir -p /bucket
mountpoint -q /bucket || gcsfuse --implicit-dirs '$BUCKET' /bucket
pip install --quiet uv
uv venv --quiet --allow-existing --python=3.12 /opt/venv
uv pip install --quiet --python=/opt/venv/bin/python \
  '/bucket/modelstock_jax-0.1.0-py3-none-any.whl[train,tpu]'
/opt/venv/bin/modelstock train --config=clip_vit_b32 \
  --workdir=/bucket/runs/$name --config.data.data_dir=/bucket/data \
  --config.mesh.stock=2 --config.mesh.fsdp_min_size=65536
END

gcloud compute tpus queued-resources delete "$name" --project="$PROJECT" \
  --zone="$ZONE" --force --quiet || true  # there is none at the first start
gcloud compute tpus queued-resources create "$name" --project="$PROJECT" \
  --zone="$ZONE" --node-id="$name" --accelerator-type=v5litepod-8 \
  --runtime-version=v2-alpha-tpuv5-lite --spot \
  --metadata-from-file=startup-script="$startup"
