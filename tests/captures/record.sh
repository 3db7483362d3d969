#!/bin/sh
# Records clients.pcap anew: what clients on Linux send to a VIP, with the addresses of the packet cases (tests/src/cases.rs),
# in two network namespaces of its own. Needs root, tcpdump, nginx, curl, socat, ping, openssl, ethtool.
set -eu
file=$(dirname "$(realpath "$0")")/clients.pcap
directory=$(mktemp --directory)
client=recorded-client-$$
vip=recorded-vip-$$
started=
finish() {
    # Whichever of them there are by now.
    for process in $started; do kill "$process" 2>/dev/null || true; done
    ip netns delete $client 2>/dev/null || true
    ip netns delete $vip 2>/dev/null || true
    rm -rf "$directory"
}
trap finish EXIT
trap 'exit 1' INT TERM

ip netns add $client
ip netns add $vip
ip link add name eth0 netns $client address 02:00:00:00:0b:0a type veth peer name eth0 netns $vip address 02:00:00:00:0b:01
for one in "$client 172.18.0.10 fd00::ac12:a" "$vip 172.18.0.100 fd00::ac12:64"; do
    # shellcheck disable=SC2086 # three words
    set -- $one
    ip -n "$1" link set lo up
    ip -n "$1" address add "$2/24" dev eth0
    ip -n "$1" address add "$3/64" dev eth0 nodad
    ip -n "$1" link set eth0 up
    # Frames as they are on a wire: whole checksums, segments of their own.
    ip netns exec "$1" ethtool -K eth0 tx off tso off gso off gro off >/dev/null
done
in_client() { ip netns exec $client timeout 20 "$@" >/dev/null; }
# Somebody has to refuse it, else something else is recorded than is meant.
refused() { if in_client "$@" 2>/dev/null </dev/null; then echo "not refused: $*" >&2; exit 1; fi; }

printf 'daemon off; master_process off; pid %s/pid; error_log %s/log;
    events {} http { access_log off; client_body_temp_path %s/body; proxy_temp_path %s/a; fastcgi_temp_path %s/b;
    uwsgi_temp_path %s/c; scgi_temp_path %s/d;
    server { listen 172.18.0.100:80; listen [fd00::ac12:64]:80; location / { return 200 "hello"; } } }' \
    "$directory" "$directory" "$directory" "$directory" "$directory" "$directory" "$directory" >"$directory/conf"
ip netns exec $vip nginx -c "$directory/conf" &
started="$started $!"
for one in UDP4-LISTEN:53,bind=172.18.0.100 'UDP6-LISTEN:53,bind=[fd00::ac12:64]'; do
    ip netns exec $vip socat "$one,fork,reuseaddr" SYSTEM:cat &
    started="$started $!"
done
ip netns exec $client tcpdump -i eth0 -Q out -s 0 -U -w "$file" --immediate-mode 2>"$directory/tcpdump" &
recorder=$!
started="$started $recorder"
until grep -q "listening on" "$directory/tcpdump" && ip netns exec $vip ss -Hltun | grep -q ":53" && ip netns exec $vip ss -Hltun | grep -q ":80"; do sleep 0.1; done

for address in 172.18.0.100 '[fd00::ac12:64]'; do
    # One request, two on one connection, a body in several segments, one with ECN, one without timestamps.
    in_client curl -s "http://$address/"
    in_client curl -s "http://$address/one" "http://$address/two"
    head -c 9000 /dev/zero | in_client curl -s -T - "http://$address/"
    ip netns exec $client sysctl -qw net.ipv4.tcp_ecn=1 net.ipv4.tcp_timestamps=0
    in_client curl -s "http://$address/"
    ip netns exec $client sysctl -qw net.ipv4.tcp_ecn=2 net.ipv4.tcp_timestamps=1
    # One that is closed with an answer unread, so by a reset, one to a port without a listener.
    printf 'GET / HTTP/1.1\r\nHost: vip\r\n\r\n' | in_client socat -u - "TCP:$address:80"
    refused curl -s "http://$address:81/"
    # What a TLS client begins with, to a server that speaks none.
    refused openssl s_client -connect "$address:80"
    # Datagrams: small, empty but for a line, in fragments.
    for bytes in 33 1 4000; do
        head -c $bytes /dev/zero | in_client socat -t 0.5 - "UDP:$address:53"
    done
    plain=$(echo "$address" | tr -d '[]')
    in_client ping -n -c 2 -i 0.2 "$plain"
    in_client ping -n -c 1 -s 3000 "$plain"
    in_client ping -n -c 1 -Q 0x2e "$plain"
    in_client ping -n -c 1 -t 1 "$plain"
done
# With an option, and the neighbour asked again.
in_client ping -n -c 1 -R 172.18.0.100
ip -n $client neighbour flush dev eth0
in_client ping -n -c 1 172.18.0.100
in_client ping -n -c 1 fd00::ac12:64
kill -INT $recorder
wait $recorder
