#!/usr/bin/env bash
# Puts coap_websocket on a Raspberry Pi, or takes it away without a trace: sudo bash setup.sh [--help]
#
# Everything is checked, asked for and prepared in a private folder before the first change. What is there before that
# change is kept in one tar, from which --uninstall puts it back. Every file is replaced by one rename. So a run may be
# interrupted anywhere: run it again, or uninstall.

[ -n "${BASH_VERSION:-}" ] || { echo "setup.sh: this needs bash: sudo bash setup.sh" >&2; exit 1; }
set -eu
shopt -s nullglob globstar
umask 077
export LC_ALL=C.UTF-8

usage() {
    cat <<'END'
sudo bash setup.sh [OPTION]...

  --address ADDR/LEN   IPv6 address of the gateway (2001:470:7347:c810::1234/64)
  --interface IF       network interface of the motes (usb0)
  --token-file F       the bot token is the first line of F; "-" asks for a new one
  --password-file F    the same for the password of the bot's config messages
  --uninstall          put everything back as it was before the first run
  --help

Without these files the token and the password come from the environment (BOT_TOKEN, PASSWORD), else from the last
installation, else they are asked for. Address and interface stay as they were last set.

In the firmware's repository, ../src/config.ini.template is renamed to ../src/config.ini and gets the token too, as the
firmware's build expects it. --uninstall puts it back.
END
}

binary=/usr/local/bin/coap_websocket
unit=/etc/systemd/system/coap_websocket.service
etc=/etc/coap_websocket
connection=/etc/NetworkManager/system-connections/coap_websocket.nmconnection
# All that is ours, besides rc.local and the firmware's template.
places=("$binary" "$unit" "$unit.d" "$etc" "$connection" /var/{lib,log}/{,private/}coap_websocket
    /etc/systemd/system/*.wants/coap_websocket.service)
rc_local=$(readlink -m /etc/rc.local)
mark='  # coap_websocket'           # ends each of our lines in rc.local
kept=/var/lib/coap_websocket-setup  # what was there before, for --uninstall
stage=$kept/stage                   # what this run prepares; not in /tmp or /run, where programs may not run
part=.coap_websocket-new            # ends the name of a file that is being written
explained=false                     # has the fault that ends this run been named?

main() {
    local address='' interface='' token_file='' password_file='' uninstall=false option lock
    while [ $# -gt 0 ]; do
        case $1 in
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            --help) usage; return ;;
            --uninstall) uninstall=true; shift ;;
            --address | --interface | --token-file | --password-file)
                [ -n "${2:-}" ] || die "$1 needs a value; see bash setup.sh --help"
                option=${1#--}
                printf -v "${option/-/_}" %s "$2"
                shift 2
                ;;
            *) die "unknown option $1; see bash setup.sh --help" ;;
        esac
    done

    [ "$(id -u)" = 0 ] || die "not root: run sudo bash setup.sh"
    [ -d /run/systemd/system ] || die "systemd does not run here: start this on the booted Pi"
    command -v ip >/dev/null || die "no ip command: run apt install iproute2"
    exec {lock}</var/lib
    flock -n "$lock" || die "another setup.sh is running: wait for it"
    trap finish EXIT
    trap 'exit 130' INT TERM HUP
    clear_stage
    mkdir -p "$stage" 2>/dev/null || die "cannot write to /var/lib: is the file system read-only, or full?"
    local old_address='' old_interface=''  # what the last run gave the Pi
    [ ! -e "$kept/address" ] || read -r old_address old_interface <"$kept/address"
    if $uninstall; then take_away; else put_on; fi
}

die() {
    explained=true
    printf 'setup.sh: %s\n' "$1" >&2
    exit 1
}

finish() {
    local status=$?
    clear_stage
    [ $status = 0 ] || $explained ||
        echo "setup.sh: stopped before the end; mend what was said above, then run the same command again" >&2
}

# Until something is kept, nothing has been changed.
clear_stage() {
    if [ -e "$kept/before.tar" ]; then rm -rf "$stage"; else rm -rf "$kept"; fi
}

# ---- put on ----------------------------------------------------------------------------------------------------

put_on() {
    local here config token='' password='' new_address=$address
    export -n BOT_TOKEN PASSWORD  # not for our children
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    prepare_unit_and_binary
    choose_address
    prepare_rc_local
    prepare_settings
    prepare_firmware
    prepare_connection

    keep_what_is_there
    [ -d "$etc" ] || mkdir -m 755 "$etc"
    place binary "$binary"
    place unit "$unit"
    place config.ini "$etc/config.ini"
    place env "$etc/.env"
    [ ! -e "$stage/firmware.ini" ] || place_in_firmware
    if [ "$old_address $old_interface" != "$address $interface" ]; then
        drop_address "$old_address" "$old_interface"
        echo "$address $interface" >"$stage/address"
        mv "$stage/address" "$kept/address"
    fi
    place rc.local "$rc_local"
    [ ! -e "$stage/connection" ] || place connection "$connection"
    add_address
    start
}

prepare_unit_and_binary() {
    local source=$here/coap_websocket said
    [ -f "$here/coap_websocket.service" ] ||
        die "coap_websocket.service is not beside setup.sh: copy the whole folder, then run it there"
    install -m 644 "$here/coap_websocket.service" "$stage/unit"

    [ -f "$source" ] || source=$here/target/release/coap_websocket
    [ -f "$source" ] || die 'no coap_websocket beside setup.sh: see "Get the binary" in README.md'
    # Not uname -m: it names the kernel, which may be a 64-bit one under a 32-bit system.
    [ "$(machine_of "$source")" = "$(machine_of /bin/sh)" ] ||
        die "$source is no program for this system ($(dpkg --print-architecture)): see \"Get the binary\" in README.md"
    install -m 755 "$source" "$stage/binary"
    said=$(timeout 10 "$stage/binary" --version 2>&1 </dev/null) ||
        die "$source does not run here (${said##*$'\n'}): see \"Get the binary\" in README.md"
}

# The bytes of an ELF file that tell its class, byte order and machine.
machine_of() { od -An -v -tx1 -N6 "$1"; od -An -v -tx1 -j18 -N2 "$1" 2>/dev/null || true; }

choose_address() {
    address=${address:-${old_address:-2001:470:7347:c810::1234/64}}
    interface=${interface:-${old_interface:-usb0}}
    { [[ $address =~ ^[[:xdigit:]]*:[[:xdigit:]:.]*/[0-9]+$ ]] && ip -6 addr show to "$address" >/dev/null 2>&1; } ||
        die "$address is not an IPv6 address with its prefix length, such as 2001:470:7347:c810::1234/64"
    [[ ! ${address,,} =~ ^fe[89ab].: ]] || die "$address holds for one link only: give another, such as fd00:1234::1/64"
    [[ $interface =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$ ]] || die "$interface is not the name of an interface, such as usb0"
}

prepare_rc_local() {
    local was=$stage/rc.local.was shebang='#!/bin/sh' rest=1
    if [ -e "$rc_local" ]; then cp -aT "$rc_local" "$was"; else printf '%s\n' "$shebang" 'exit 0' >"$was"; fi
    { [ -f "$was" ] && ! LC_ALL=C grep -aqP '\0' "$was"; } ||
        die "$rc_local is not a text file: move it away, then run this again"
    if [ "$(head -c 2 "$was")" = '#!' ]; then shebang=$(head -n 1 "$was") rest=2; fi
    [[ $shebang =~ ^'#!'\ *(/usr)?/bin/(env\ +)?(ba|da)?sh(\ .*)?$ ]] ||
        die "$rc_local is not a shell script: move it away, then run this again"
    [ -x "$was" ] || chmod 755 "$was"  # else it never runs
    cp -a "$was" "$stage/rc.local"
    {
        echo "$shebang"
        # Right behind the shebang they run, whatever exit comes later.
        adds_address "$address" "$interface" ||
            printf '%s\n' "sleep 1$mark" "ip -6 addr add $address dev $interface || true$mark"
        tail -n "+$rest" "$was" | sed "/$mark\$/d"
    } >"$stage/rc.local"
}

# Does a line that is not ours add this address? It would fail after ours, and end a script that runs under -e.
adds_address() {
    [ -f "$rc_local" ] && sed "/^exit/q; /$mark\$/d" "$rc_local" | grep -Eq "^[^#]*addr add $1 dev $2([ ;|]|\$)"
}

# NetworkManager would take away an address that it does not know.
prepare_connection() {
    systemctl is-active -q NetworkManager || return 0
    printf '%s\n' '[connection]' id=coap_websocket type=ethernet "interface-name=$interface" autoconnect-priority=10 '' \
        '[ipv4]' method=disabled '' '[ipv6]' method=manual "address1=$address" >"$stage/connection"
}

# ---- put on: config.ini and .env -------------------------------------------------------------------------------

prepare_settings() {
    local src=$here/../src offer listen=''
    ask token "bot token" "$token_file" "${BOT_TOKEN:-}" "$(value_of "$etc/config.ini" bot_token)" \
        "$(value_of "$src/config.ini" bot_token)" "as BotFather shows it: digits, a colon and 35 letters"
    with_value "$etc/config.ini" bot_token "$token" >"$stage/config.ini"

    offer=$(value_of "$src/.env" PASSWORD)
    ask password password "$password_file" "${PASSWORD:-}" "$(value_of "$etc/.env" PASSWORD)" \
        "${offer:-$(value_of "$here/.env" PASSWORD)}" "8 characters or more, no white space, no quote in front"
    with_value "$etc/.env" PASSWORD "$password" >"$stage/env.password"
    # What somebody wrote there by hand (:: for every interface) stays until another address is asked for.
    [ -n "$new_address" ] || listen=$(value_of "$etc/.env" COAP_SERVER_IP)
    with_value "$stage/env.password" COAP_SERVER_IP "${listen:-${address%/*}}" >"$stage/env"
}

# Where the script stands in the firmware's repository. A config.ini that somebody else made there is theirs.
prepare_firmware() {
    local source word
    config=$(cd "$here/../src" 2>/dev/null && pwd)/config.ini || return 0
    [ -e "$kept/firmware$config.template" ] || { [ -e "$config.template" ] && [ ! -e "$config" ]; } || return 0
    source=$config
    [ -e "$source" ] || source=$config.template
    word=$(value_of "$stage/config.ini" mote_token)  # what motes present instead of the real one
    with_value "$source" bot_token "${word:-$token}" >"$stage/firmware.ini"
    chown --reference="$source" "$stage/firmware.ini"
}

is_token() { [[ $1 =~ ^[0-9]+:[A-Za-z0-9_-]{30,}$ ]]; }
is_password() { [ ${#1} -ge 8 ] && [[ ! $1 =~ [[:space:][:cntrl:]] && $1 != [\'\"]* ]]; }

# ask VARIABLE NAME FILE GIVEN INSTALLED OFFER RULE: sets the variable from the file, else from what the environment
# gave, else from what is installed, else from the terminal, where Enter takes the offer.
ask() {
    local -n answer=$1
    local name=$2 file=$3 given=$4 installed=$5 offer=$6 rule=$7 hidden='' wrong=''
    if [ "$file" = - ]; then
        given='' installed='' offer=''
    elif [ -n "$file" ]; then
        given=$(head -n 1 "$file" 2>/dev/null | tr -d '\r')
        [ -n "$given" ] || die "cannot read the $name from $file: write it there as the first line, then run this again"
    fi
    "is_$1" "$offer" || offer=''
    [ "$1" != password ] || hidden=s
    answer=${given:-$installed}
    until "is_$1" "$answer"; do
        [ -z "$given" ] || die "that is no $name ($rule): nothing was changed"
        [ -t 0 ] || die "no $name and no terminal to ask for it: write it to a file, then run this with --$1-file FILE"
        printf '%s%s (%s)%s: ' "$wrong" "${name^}" "$rule" "${offer:+, or Enter for the one of the program before}" >&2
        IFS= read "-r$hidden" answer || die "no $name: nothing was changed"
        [ -z "$hidden" ] || echo >&2
        answer=${answer:-$offer}
        wrong='That is not it. '
    done
}

# Finds a key in a file of variables, or in [telegram] of an INI file: its line, and its value without quotes.
# shellcheck disable=SC2016
find_key='
    { text[NR] = $0 }
    /^[ \t]*\[/ { elsewhere = !/^[ \t]*\[[ \t]*telegram[ \t]*\]/; if (!elsewhere) head = NR }
    !elsewhere && match(tolower($0), "^[ \t]*(export[ \t]+)?" tolower(key) "[ \t]*=[ \t]*") {
        at = NR
        value = substr($0, RLENGTH + 1)
        sub(/[ \t\r]+$/, "", value)
        if (value ~ /^(".*"|\047.*\047)$/) value = substr(value, 2, length(value) - 2)
    }'

# value_of FILE KEY
value_of() { [ ! -f "$1" ] || awk -v key="$2" "$find_key"' END { print value }' "$1"; }

# with_value FILE KEY VALUE: the text of FILE with that value, every other line as it is. LINE stands in the environment,
# which only root can read, not among the arguments, which everybody can.
with_value() {
    local file=$1 line="$2=$3"
    [ -f "$file" ] || file=/dev/null
    if [ "$(value_of "$file" "$2")" = "$3" ]; then cat "$file"; return; fi
    [ "$2" != bot_token ] || line="$2 = $3"
    LINE=$line awk -v key="$2" "$find_key"'
        END {
            n = NR
            if (!at && !head && key == "bot_token") text[head = ++n] = "[telegram]"
            if (at) text[at] = ENVIRON["LINE"]
            else if (head) text[head] = text[head] "\n" ENVIRON["LINE"]
            else text[++n] = ENVIRON["LINE"]
            for (i = 1; i <= n; i++) print text[i]
        }' "$file"
}

# ---- put on: changes -------------------------------------------------------------------------------------------

# Once: later runs would keep their own work.
keep_what_is_there() {
    local path there=()
    [ ! -e "$kept/before.tar" ] || return 0
    ip -6 -o addr show | awk '{ print $2, $4 }' >"$kept/addresses"
    ! systemctl is-active -q coap_websocket || touch "$kept/active"
    cp "$stage/rc.local" "$kept/rc.local"
    for path in "${places[@]}" "$rc_local"; do
        if [ -e "$path" ] || [ -L "$path" ]; then there+=("${path#/}"); fi
    done
    # 1: a file changed meanwhile, such as the log of what runs there now.
    tar -C / --numeric-owner --warning=no-file-changed -cf "$stage/before.tar" -T /dev/null "${there[@]}" || [ $? = 1 ]
    sync "$stage/before.tar"
    mv "$stage/before.tar" "$kept/before.tar"
}

# place NAME TARGET: makes TARGET what was prepared as NAME.
place() {
    local new=$stage/$1 target=$2
    if [ ! -L "$target" ] && cmp -s "$new" "$target" &&
        [ "$(stat -c %a:%u:%g "$new" "$target" | uniq | wc -l)" = 1 ]; then
        echo "$target: unchanged"
    else
        replace "$new" "$target"
        echo "$target: installed"
    fi
}

# replace SOURCE TARGET: whole or not at all.
replace() {
    cp -a "$1" "$2$part"
    sync "$2$part"
    mv -fT "$2$part" "$2"
}

place_in_firmware() {
    local was=$kept/firmware$config.template
    mkdir -p "${was%/*}"
    [ -e "$was" ] || replace "$config.template" "$was"
    place firmware.ini "$config"
    rm -f "$config.template"
}

# What rc.local and NetworkManager do at the next boot, now.
add_address() {
    [ ! -e "$stage/connection" ] || nmcli connection reload
    if ! ip link show dev "$interface" >/dev/null 2>&1; then
        echo "$interface: not there now; once it is plugged in, run this again or reboot to give it $address"
    elif [ -n "$(address_there "$address" "$interface")" ]; then
        echo "$address on $interface: unchanged"
    else
        [ ! -e "$stage/connection" ] || nmcli -w 15 connection up coap_websocket ifname "$interface" >/dev/null 2>&1 || true
        [ -n "$(address_there "$address" "$interface")" ] || ip -6 addr add "$address" dev "$interface"
        echo "$address on $interface: added"
    fi
}

# Unless it was there before.
drop_address() {
    local there
    there=$(address_there "$1" "$2")
    if [ -z "$there" ] || grep -qxF "$there" "$kept/addresses" || adds_address "$1" "$2"; then return; fi
    ip -6 addr del "$1" dev "$2"
    echo "$1 on $2: removed"
}

# Prints interface and address if that interface has that address.
address_there() { ip -6 -o addr show dev "$2" to "${1%/*}" 2>/dev/null | awk '{ print $2, $4; exit }'; }

start() {
    local said works=true fault="the service does not run; it says why: sudo journalctl -u coap_websocket -n 20"
    systemctl daemon-reload
    systemctl -q enable coap_websocket
    systemctl restart coap_websocket 2>/dev/null || die "$fault"
    echo "service: enabled and restarted"
    echo
    # With the service's files, and without what root has in its environment.
    said=$(cd / && env -i PATH="$PATH" "$binary" check 2>&1) || works=false
    printf '%s\n' "$said" '' 'Watch it:   sudo systemctl status coap_websocket' \
        '            sudo journalctl -fu coap_websocket'
    # It says that it is ready before it has its address: some faults come later.
    systemctl is-active -q coap_websocket || die "$fault"
    $works || case $said in
        *" 401"* | *" 404"*) die "Telegram does not know this token; give it another: sudo bash setup.sh --token-file -" ;;
        *) die "installed and running, but see what the check says above; then run this again" ;;
    esac
}

# ---- take away -------------------------------------------------------------------------------------------------

take_away() {
    local path before=$stage/before
    if [ ! -e "$kept/before.tar" ]; then
        echo "Nothing to uninstall: setup.sh has installed nothing here."
        return
    fi
    mkdir "$before"
    tar -C "$before" --numeric-owner -xpf "$kept/before.tar"
    systemctl stop coap_websocket 2>/dev/null || true
    systemctl reset-failed coap_websocket 2>/dev/null || true
    echo "service: stopped"

    [ -z "$old_address" ] || drop_address "$old_address" "$old_interface"
    give_back_rc_local "$before$rc_local"
    for path in "$kept"/firmware/**/config.ini.template; do give_back_template "$path"; done
    rm -rf "${places[@]}" "${places[@]/%/$part}"
    echo "coap_websocket and its files: removed"
    tar -C / --numeric-owner --exclude="${rc_local#/}" -xpf "$kept/before.tar"
    echo "what was there before: restored"

    systemctl daemon-reload
    ! systemctl is-active -q NetworkManager || nmcli connection reload
    [ ! -e "$kept/active" ] || systemctl start coap_websocket
    rm -rf "$kept"
    echo "coap_websocket is gone."
}

# give_back_rc_local WAS: as it was, or as somebody has edited it since, but without our lines.
give_back_rc_local() {
    local was=$1
    rm -f "$rc_local$part"
    [ -f "$rc_local" ] || return 0
    cp -a "$rc_local" "$stage/edited"
    sed -i "/$mark\$/d" "$stage/edited"
    if ! sed "/$mark\$/d" "$kept/rc.local" | cmp -s - "$stage/edited"; then
        [ ! -e "$was" ] || chmod --reference="$was" "$stage/edited"
        replace "$stage/edited" "$rc_local"
        echo "$rc_local: freed of our lines"
    elif [ -e "$was" ]; then
        replace "$was" "$rc_local"
    else
        rm "$rc_local"
        echo "$rc_local: removed"
    fi
}

# give_back_template WAS: the firmware's template as it was, or with what was edited in config.ini since, but without
# the token.
give_back_template() {
    local was=$1 template=${1#"$kept/firmware"} config
    config=${template%.template}
    rm -f "$config$part" "$template$part"
    [ -e "$config" ] || return 0
    cp -a "$was" "$stage/template"
    if ! with_value "$was" bot_token "$(value_of "$config" bot_token)" | cmp -s - "$config"; then
        with_value "$config" bot_token "$(value_of "$was" bot_token)" >"$stage/template"
    fi
    replace "$stage/template" "$template"
    rm "$config"
    echo "$template: restored"
}

main "$@"
