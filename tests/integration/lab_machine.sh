#!/bin/bash
# The first process of a machine of lab.py, in namespaces of its own: sets the machine up, then becomes its sshd.
# lab_machine.sh FOLDER NAME [KEPT...]: FOLDER/tmp becomes /tmp, with what KEPT names in the real /tmp still in it.
set -euo pipefail
folder=$1 name=$2
shift 2
hostname "$name"
ip link set lo up
mount --make-rprivate /
mount --bind "$folder/passwd" /etc/passwd
mount --bind "$folder/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
mount -t tmpfs -o size=1g tmpfs /dev/shm
mkdir -p "$folder/tmp/shared"
mount --bind "$folder/../shared" "$folder/tmp/shared"
for kept in "$@"; do
    mkdir -p "$folder/tmp/${kept#/tmp/}"
    mount --rbind "$kept" "$folder/tmp/${kept#/tmp/}"
done
chmod 1777 "$folder/tmp"
mount --rbind "$folder/tmp" /tmp
mkdir -p /run/sshd
cd /
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /usr/sbin/sshd -D -e -f /tmp/etc/sshd_config
