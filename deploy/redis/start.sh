#!/bin/sh
# Makes the ACL file of users.acl and the secrets, then becomes the command it was given.
# Only hashes are written, and only to memory: the container's file system is read-only.
#   ACL_TEMPLATE, SECRETS, ACL_FILE   where things are, if not where compose.yaml has them
set -eu
umask 077
template=${ACL_TEMPLATE:-/etc/agent-reconciler/users.acl}
secrets=${SECRETS:-/run/secrets}
file=${ACL_FILE:-/tmp/users.acl}

rules=$(sed -e '/^#/d' -e '/^$/d' "$template")
for name in host worker reader admin; do
  secret=$secrets/redis_$name
  if [ ! -s "$secret" ]; then
    echo "start.sh: the secret $secret is missing or empty; \`make secrets\` makes it" >&2
    exit 2
  fi
  hash=$(tr -d '\r\n' <"$secret" | sha256sum | cut -d ' ' -f 1)
  rules=$(printf '%s\n' "$rules" | sed "s/#<$name>/#$hash/")
done
# A line that begins with blanks goes on with the user above it.
printf '%s\n' "$rules" | awk '/^user/ {if (line) print line; line = $0; next}
  {sub(/^ +/, ""); line = line " " $0} END {print line}' >"$file"
exec "$@"
