-- A host renews its lease, and tells the time of Redis.
--
-- KEYS  1 hosts (sorted set)   2 seqs
-- ARGV  1 process   2 time to live in ms
-- Answer  {Redis time in ms, last seq of the process in the log}
-- Errors  FENCED   the process was declared lost
local last = redis.call('HGET', KEYS[2], ARGV[1])
if last == 'lost' then return redis.error_reply('FENCED') end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
return {now, tonumber(last or '0')}
