-- A worker looks after the conversations of an app: which are past their time, which ended untold.
-- Sets its epoch, so that from now on whoever has an older one is refused.
--
-- KEYS  1 keeper   2 sessions   3 used   4 ended
-- ARGV  1 "holder epoch"   2 retention in ms, "" for ever   3 most answers   4 how many due ones to pass over
-- Answer  {due members, notes of what ended}
-- Errors  FENCED   a worker with a newer epoch looks after them
-- with: conversation_functions
local function epoch_of(token)
  return tonumber(string.match(token, '(%d+)$'))
end
if epoch_of(redis.call('GET', KEYS[1]) or '0') > epoch_of(ARGV[1]) then
  return redis.error_reply('FENCED')
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', 30 * 86400000)
local now = now_ms()
forget_expired(now, KEYS[2], KEYS[3], KEYS[4])
-- Conversations of a time when uses were not noted: theirs count from now.
if redis.call('ZCARD', KEYS[3]) < redis.call('ZCARD', KEYS[2]) then
  local unknown = redis.call('ZDIFF', 2, KEYS[2], KEYS[3])
  for i = 1, math.min(#unknown, 1000) do redis.call('ZADD', KEYS[3], whole(now), unknown[i]) end
end
local due = {}
if ARGV[2] ~= '' then
  due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', whole(now - tonumber(ARGV[2])),
    'LIMIT', ARGV[4], ARGV[3])
end
return {due, redis.call('ZRANGE', KEYS[4], 0, tonumber(ARGV[3]) - 1)}
