"""What happens in one step inside Redis, in Lua. Versions are text of a fixed width, because Lua's numbers are
floats."""

OPEN = """
local held = redis.call('HMGET', KEYS[1], 'consumer', 'fingerprint', 'position', 'owner', 'source')
if held[4] and (held[1] ~= ARGV[1] or held[2] ~= ARGV[2]) then return {'another', held[1] .. ' ' .. held[2], ''} end
local source = held[5]
if not source and held[3] then  -- of before the source was kept: its topics begin with it
  for topic in pairs(cjson.decode(held[3]).topics) do source = string.match(topic, '^(.*)%.[^.]*%.[^.]*$') end
end
-- The process of another source goes on with it.
if held[4] and source and source ~= ARGV[5] then return {'ok', held[3] or '', source} end
redis.call('HSET', KEYS[1], 'consumer', ARGV[1], 'fingerprint', ARGV[2], 'owner', ARGV[3], 'source', ARGV[5], 'writes', 0)
redis.call('SADD', KEYS[2], ARGV[4])
-- Somebody took its state away: readers see nothing before they see a half.
if not held[3] and redis.call('GET', KEYS[3]) == ARGV[4] then redis.call('DEL', KEYS[3]) end
return {'ok', held[3] or '', ''}
"""

PROMOTE = """
local held = redis.call('HMGET', KEYS[1], 'owner', 'position')
if not held[1] then return 'wiped' end
if held[1] ~= ARGV[1] then return 'taken' end
-- A write, so that a Redis which takes none says so, whatever the rest finds.
redis.call('HSET', KEYS[1], 'owner', ARGV[1])
if not held[2] then return 'wiped' end
redis.call('SET', KEYS[2], ARGV[2])
return 'ok'
"""

# What has no owner is dropped, wherever the rest of a drop may be cut short.
DROP = """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
redis.call('HDEL', KEYS[1], 'owner', 'position')
"""

UNLINK = """
if (redis.call('HGET', KEYS[1], 'owner') or '') == ARGV[1] then redis.call('UNLINK', unpack(ARGV, 2)) end
"""

FORGET = """
if redis.call('HEXISTS', KEYS[1], 'owner') == 1 then return end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
"""

WRITE = """
local held = redis.call('HMGET', KEYS[1], 'owner', 'position', 'writes')
if not held[1] then return 'wiped' end
if held[1] ~= ARGV[2] then return 'taken' end
local position, writes, count = held[2] or '', tonumber(held[3] or 0), tonumber(ARGV[5])
if position ~= ARGV[3] and (ARGV[4] == '' or position ~= ARGV[4]) then return 'moved' end
-- Pages without a position may be what it has lost; one more is this call, whose answer was lost.
if writes ~= count and writes ~= count + 1 then return 'moved' end
-- Redis looks at its memory only at a script's first write, and a DEL may always run: so this one must come first.
redis.call('HSET', KEYS[1], 'writes', string.format('%d', count + 1))
local i = 6
while i <= #ARGV do
    local key, version, fields = ARGV[1] .. ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
    local held_version = redis.pcall('HGET', key, '@version')
    if type(held_version) ~= 'string' or held_version <= version then
        redis.call('DEL', key)
        local last = i + 2 + 2 * fields
        for f = i + 3, last, 1000 do
            redis.call('HSET', key, '@version', version, unpack(ARGV, f, math.min(f + 999, last)))
        end
    end
    i = i + 3 + 2 * fields
end
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'position', ARGV[4]) end
return 'ok'
"""

GENERATIONS = """
local live, found = redis.call('GET', KEYS[1]) or '', {}
for _, number in ipairs(redis.call('SMEMBERS', KEYS[2])) do
    local held = redis.call('HMGET', ARGV[1] .. number, 'consumer', 'fingerprint', 'owner')
    if held[1] then table.insert(found, {number, held[1], held[2], live, held[3] or ''}) end
end
return found
"""

READ = """
local live = redis.call('GET', KEYS[1])
if not live then return {'nothing'} end
return {'ok', redis.call('HMGET', ARGV[1] .. live .. ':' .. ARGV[2], 'html', 'etag', '@version')}
"""

APPLIED = """
local live = redis.call('GET', KEYS[1])
return live and redis.call('HGET', ARGV[1] .. live, 'position')
"""
