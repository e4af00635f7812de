#!/usr/bin/env bash
# Start the broker of the image of apache/kafka; after a kill, end its old session first.
#
# A node that was killed is still registered as the leader of everything. Started as it is, it would take up the
# transactions that were being committed, then be fenced because its old session ends, and Kafka 4 would never write
# their commit markers (KAFKA-20734): readers of committed records would be stuck for ever. So after a kill the
# controller runs alone first, until it has fenced the broker or has found none to fence.
set -eu

data=$KAFKA_LOG_DIRS
work=/tmp/headrace-controller
if [ -e "$data/meta.properties" ] && [ ! -e "$data/.kafka_cleanshutdown" ]; then
    echo "Kafka was killed: ending its old session"
    mkdir -p "$work"
    cat > "$work/controller.properties" <<CONF
process.roles=controller
node.id=$KAFKA_NODE_ID
controller.quorum.voters=$KAFKA_CONTROLLER_QUORUM_VOTERS
controller.listener.names=$KAFKA_CONTROLLER_LISTENER_NAMES
listeners=CONTROLLER://localhost:9093
log.dirs=$data
broker.session.timeout.ms=100
CONF
    cat > "$work/log4j2.properties" <<CONF
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %-5p %c{1}: %m%n
rootLogger.level=INFO
rootLogger.appenderRef.console.ref=console
logger.controller.name=org.apache.kafka.controller
logger.controller.level=DEBUG
CONF
    KAFKA_LOG4J_OPTS="-Dlog4j2.configurationFile=$work/log4j2.properties" \
        /opt/kafka/bin/kafka-server-start.sh "$work/controller.properties" > "$work/log" 2>&1 &
    controller=$!
    trap 'kill "$controller" 2>/dev/null || true; exit 143' TERM
    ended=
    # What it says before the fencing is in its log does not count; after forty looks without a broker to fence there is none.
    for _ in $(seq 600); do
        kill -0 "$controller" 2>/dev/null || break
        if grep -q "Fencing broker $KAFKA_NODE_ID " "$work/log"; then
            fencing=$(grep -o "Read-write operation maybeFenceStaleBroker([0-9]*)" "$work/log" | head -n 1 | grep -o "maybe.*" || true)
            if [ -n "$fencing" ] && grep -qF "Processed $fencing in " "$work/log"; then ended=yes; fi
        elif [ "$(grep -c "maybeFenceStaleBroker generated 0 records" "$work/log")" -ge 40 ]; then
            ended=yes
        fi
        if [ -n "$ended" ]; then break; fi
        sleep 0.1
    done
    kill "$controller" 2>/dev/null || true
    wait "$controller" || true
    trap - TERM
    tail -n 3 "$work/log"
    if [ -z "$ended" ]; then
        echo "Its old session was not ended in a minute: starting again, for readers would be stuck for ever"
        exit 1
    fi
fi
exec /etc/kafka/docker/run
