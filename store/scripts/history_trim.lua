-- Take entries out of the stream that are covered: by a snapshot, and by the archive unless it is off.
-- The last entry of a stream always stays: it says where the log ends.
--
-- KEYS  1 lease   2 log   3 history   4 snapshots
-- ARGV  1 "holder epoch"   2 entry id: this one and all before it may go   3 "archived" or "dropped"
-- Answer  {how many went, id of the last of them}
-- Errors  FENCED      the lease is not held under this epoch any more; nothing is trimmed
--         UNCOVERED   no snapshot, or no archive, goes as far; nothing is trimmed
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('FENCED') end
local function before_or_at(a, b)
  local a_ms, a_n = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_n = string.match(b, '^(%d+)-(%d+)$')
  a_ms, a_n, b_ms, b_n = tonumber(a_ms), tonumber(a_n), tonumber(b_ms), tonumber(b_n)
  return a_ms < b_ms or (a_ms == b_ms and a_n <= b_n)
end
local covered = false
for _, id in ipairs(redis.call('HKEYS', KEYS[4])) do
  if string.match(id, '^%d+%-%d+$') and before_or_at(ARGV[2], id) then covered = true end
end
local trimmed = redis.call('HGET', KEYS[3], 'trimmed') or '0-0'
if ARGV[3] == 'archived' then
  local archived = redis.call('HGET', KEYS[3], 'archived')
  covered = covered and archived and before_or_at(ARGV[2], archived)
end
if not covered then return redis.error_reply('UNCOVERED') end

local keep = redis.call('XRANGE', KEYS[2], '(' .. ARGV[2], '+', 'COUNT', 1)[1]
if not keep then keep = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1] end
if not keep then return {0, trimmed} end
local last = redis.call('XREVRANGE', KEYS[2], '(' .. keep[1], '-', 'COUNT', 1)[1]
if not last then return {0, trimmed} end
local gone = redis.call('XTRIM', KEYS[2], 'MINID', keep[1])
redis.call('HSET', KEYS[3], 'trimmed', last[1])
if ARGV[3] == 'dropped' then
  redis.call('HSET', KEYS[3], 'dropped', last[1])
else
  redis.call('HINCRBY', KEYS[3], 'trimmed_entries', gone)
end
return {gone, last[1]}
