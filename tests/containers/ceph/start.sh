#!/bin/sh
# One monitor, one store and one object gateway on the loopback interface; started again it finds its data.
# In: RGW_PORT, ACCESS_KEY, SECRET_KEY; STORE_BYTES, 4 GiB by default (what is removed keeps its room for two hours).
# The health check of the container says when the gateway answers.
set -eu
port=${RGW_PORT:-7480}
mon=/var/lib/ceph/mon/ceph-a
osd=/var/lib/ceph/osd/ceph-0
rgw=/var/lib/ceph/radosgw/ceph-rgw.a

configure() {
    mkdir -p "$mon" "$osd" "$rgw" /run/ceph
    fsid=$(cat /proc/sys/kernel/random/uuid)
    # A single copy of everything, and little memory: what is stored here lives as long as a test.
    cat >/etc/ceph/ceph.conf <<C
[global]
fsid = $fsid
mon_initial_members = a
mon_host = [v2:127.0.0.1:3300,v1:127.0.0.1:6789]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_crit = 1
osd_memory_target = 939524096
bluestore_block_size = ${STORE_BYTES:-4294967296}
rgw_frontends = beast endpoint=127.0.0.1:$port
rgw_thread_pool_size = 32
C
    ceph-authtool --create-keyring /tmp/mon.keyring --gen-key -n mon. --cap mon 'allow *' >/dev/null
    ceph-authtool --create-keyring /etc/ceph/ceph.client.admin.keyring --gen-key -n client.admin \
        --cap mon 'allow *' --cap osd 'allow *' >/dev/null
    ceph-authtool /tmp/mon.keyring --import-keyring /etc/ceph/ceph.client.admin.keyring >/dev/null
    monmaptool --create --addv a '[v2:127.0.0.1:3300,v1:127.0.0.1:6789]' --fsid "$fsid" /tmp/monmap >/dev/null
    ceph-mon --mkfs -i a --monmap /tmp/monmap --keyring /tmp/mon.keyring
}

make_store() {
    uuid=$(cat /proc/sys/kernel/random/uuid)
    key=$(ceph-authtool --gen-print-key)
    echo "{\"cephx_secret\": \"$key\"}" | ceph osd new "$uuid" 0 -i - >/dev/null
    ceph-authtool --create-keyring "$osd/keyring" --name osd.0 --add-key "$key" >/dev/null
    ceph-osd -i 0 --mkfs --osd-uuid "$uuid"
    ceph auth get-or-create client.rgw.a osd 'allow rwx' mon 'allow rw' -o "$rgw/keyring"
}

[ -e /etc/ceph/ceph.conf ] || configure
ceph-mon -i a
[ -e "$rgw/keyring" ] || make_store
ceph-osd -i 0
radosgw -n client.rgw.a --setuser root --setgroup root
radosgw-admin user info --uid=test >/dev/null 2>&1 || radosgw-admin user create \
    --uid=test --display-name=test --access-key="$ACCESS_KEY" --secret-key="$SECRET_KEY" >/dev/null
# PID 1 of the container: ends at once when it is told to, and the daemons with it.
trap 'exit 0' TERM INT
while :; do sleep 1 & wait $!; done
