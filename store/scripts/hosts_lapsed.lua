-- The host processes whose lease has lapsed, by the clock of this very node.
--
-- KEYS  1 hosts (sorted set)   Answer  processes
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
